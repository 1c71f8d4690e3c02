"""The exercise of lesson 9: a right answer, and wrong ones that its checker must refuse."""
import torch
import torch.nn.functional as F

from decode import sample_token


def judge(p, q, drafted, u):
    """Is each drafted token kept (B,d), were it judged alone?"""
    p, q = (x.gather(2, drafted[..., None]).squeeze(2) for x in (p[:, :-1], q))
    return u[:, :-1] * q < p


def answer(kept, rest, u):
    return torch.stack([kept, sample_token(rest[torch.arange(len(kept)), kept], u[:, -1])], 1)


def solution(p, q, drafted, u):
    kept = judge(p, q, drafted, u).long().cumprod(1).sum(1)
    return answer(kept, (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0), u)


def kept_after_a_rejection(p, q, drafted, u):
    return answer(judge(p, q, drafted, u).sum(1), (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0), u)


def redrawn_from_p(p, q, drafted, u):
    return answer(judge(p, q, drafted, u).long().cumprod(1).sum(1), p, u)


def redrawn_from_the_difference(p, q, drafted, u):
    kept = judge(p, q, drafted, u).long().cumprod(1).sum(1)
    return answer(kept, (p - F.pad(q, (0, 0, 0, 1))).abs(), u)


def redrawn_at_the_place_before(p, q, drafted, u):
    kept = judge(p, q, drafted, u).long().cumprod(1).sum(1)
    found = answer((kept - 1).clamp(min=0), (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0), u)
    return torch.stack([kept, found[:, 1]], 1)


def judged_at_the_next_place(p, q, drafted, u):
    kept = judge(p.roll(-1, 1), q, drafted, u).long().cumprod(1).sum(1)
    return answer(kept, (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0), u)


def p_and_q_exchanged(p, q, drafted, u):
    kept = (~judge(p, q, drafted, 1 / u)).long().cumprod(1).sum(1)
    return answer(kept, (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0), u)


def always_kept_if_likelier(p, q, drafted, u):
    kept = judge(p, q, drafted, torch.ones_like(u)).long().cumprod(1).sum(1)
    return answer(kept, (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0), u)


def the_first_number_again(p, q, drafted, u):
    return solution(p, q, drafted, torch.cat([u[:, :-1], u[:, :1]], 1))


def transposed(p, q, drafted, u):
    return solution(p, q, drafted, u).T


mutants = [kept_after_a_rejection, redrawn_from_p, redrawn_from_the_difference,
           redrawn_at_the_place_before, judged_at_the_next_place, p_and_q_exchanged,
           always_kept_if_likelier, the_first_number_again, transposed]
