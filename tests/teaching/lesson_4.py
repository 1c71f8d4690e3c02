"""Lesson 4: a solution of its exercise, and wrong ones that its check must refuse."""
import torch


def by_block(visited, routed):
    """(B,T,L) -> which tokens ask, which have a key, both (B,L,T)."""
    runs = visited.transpose(1, 2)
    return runs, runs | ~routed[:, None]


def solution(visited, routed):
    queries, keys = by_block(visited, routed)
    return (queries[..., :, None] & keys[..., None, :]).tril()


def sees_the_future(visited, routed):
    queries, keys = by_block(visited, routed)
    return queries[..., :, None] & keys[..., None, :]


def blind_to_itself(visited, routed):
    return solution(visited, routed).tril(-1)


def query_and_key_exchanged(visited, routed):
    queries, keys = by_block(visited, routed)
    return (queries[..., None, :] & keys[..., :, None]).tril()


def all_have_keys(visited, routed):
    return solution(visited, torch.zeros_like(routed))


def no_copies(visited, routed):
    return solution(visited, torch.ones_like(routed))


def routed_for_dense(visited, routed):
    return solution(visited, ~routed)


def all_ask(visited, routed):
    _, keys = by_block(visited, routed)
    return keys[..., None, :].expand(-1, -1, visited.size(1), -1).tril()


def exited_once_is_gone(visited, routed):
    """A key needs every block so far, not this one."""
    return solution(visited.int().cumprod(-1).bool(), routed)


mutants = [sees_the_future, blind_to_itself, query_and_key_exchanged, all_have_keys, no_copies,
           routed_for_dense, all_ask, exited_once_is_gone]
