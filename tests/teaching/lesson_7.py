"""The exercise of lesson 7: a right answer, and wrong ones that its checker must refuse."""
import torch


def answer(exit_at, deepest, L):
    n = torch.arange(1, L + 1)
    return (exit_at[..., None] < n) & (deepest[..., None] >= n)


def solution(exit_at, L):
    # the deepest exit from here on: its own, which counts too, is below n where it has a copy
    return answer(exit_at, exit_at.flip(1).cummax(1).values.flip(1), L)


def an_earlier_token(exit_at, L):
    return answer(exit_at, exit_at.cummax(1).values, L)


def any_token(exit_at, L):
    return answer(exit_at, exit_at.amax(1, keepdim=True).expand_as(exit_at), L)


def the_next_token(exit_at, L):
    following = torch.cat([exit_at[:, 1:], torch.zeros_like(exit_at[:, :1])], 1)
    return answer(exit_at, following, L)


def across_rows(exit_at, L):
    return answer(exit_at, exit_at.flip(0).cummax(0).values.flip(0), L)


def deeper_than_the_block(exit_at, L):
    return answer(exit_at, exit_at.flip(1).cummax(1).values.flip(1) - 1, L)


def in_the_block_of_the_exit(exit_at, L):
    return answer(exit_at - 1, exit_at.flip(1).cummax(1).values.flip(1), L)


def every_copy(exit_at, L):
    return answer(exit_at, torch.full_like(exit_at, L), L)


def blocks_from_0(exit_at, L):
    return solution(exit_at, L).roll(1, -1)


def blocks_first(exit_at, L):
    return solution(exit_at, L).permute(2, 0, 1)


mutants = [an_earlier_token, any_token, the_next_token, across_rows, deeper_than_the_block,
           in_the_block_of_the_exit, every_copy, blocks_from_0, blocks_first]
