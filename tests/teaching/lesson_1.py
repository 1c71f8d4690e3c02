"""Lesson 1: a solution of its exercise, and wrong ones that its check must refuse."""
import torch
import torch.nn.functional as F


def solution(p, tau):
    exits = F.pad(p[..., :-1] > tau, (0, 1), value=True)
    return exits.int().argmax(-1) + 1


def or_equal(p, tau):
    return F.pad(p[..., :-1] >= tau, (0, 1), value=True).int().argmax(-1) + 1


def counted_from_zero(p, tau):
    return solution(p, tau) - 1


def never_at_the_top(p, tau):
    """No exit is confident: argmax of nothing is the first."""
    return (p[..., :-1] > tau).int().argmax(-1) + 1


def the_last_confident_exit(p, tau):
    exits = F.pad(p[..., :-1] > tau, (0, 1), value=False)
    n = torch.arange(1, p.size(-1) + 1)
    return torch.where(exits.any(-1), (exits * n).amax(-1), p.size(-1))


def doubts_counted(p, tau):
    """Also doubts after the first confident block."""
    return (p[..., :-1] <= tau).sum(-1) + 1


def one_threshold(p, tau):
    return solution(p, tau[:1].expand_as(tau))


def most_confident(p, tau):
    return p.argmax(-1) + 1


mutants = [or_equal, counted_from_zero, never_at_the_top, the_last_confident_exit, doubts_counted,
           one_threshold, most_confident]
