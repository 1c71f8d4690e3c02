"""The exercise of lesson 6: a right answer, and wrong ones that its checker must refuse."""
import torch


def solution(logit, runs, mask, thresholds):
    yes = (logit[mask] > thresholds[:, None]).float()               # (K, tokens in mask)
    hits, selected = yes @ runs[mask].float(), runs[mask].sum()
    return torch.stack([hits / yes.sum(1).clamp(min=1), hits / selected.clamp(min=1)], 1)


def at_least(logit, runs, mask, thresholds):
    return solution(logit + 0.5, runs, mask, thresholds)


def mask_forgotten(logit, runs, mask, thresholds):
    return solution(logit, runs, torch.ones_like(mask), thresholds)


def mask_of_the_selected_forgotten(logit, runs, mask, thresholds):
    found = solution(logit, runs, mask, thresholds)
    found[:, 1] *= runs[mask].sum() / runs.sum().clamp(min=1)
    return found


def exchanged(logit, runs, mask, thresholds):
    return solution(logit, runs, mask, thresholds).flip(1)


def transposed(logit, runs, mask, thresholds):
    return solution(logit, runs, mask, thresholds).T


def nothing_by_nothing(logit, runs, mask, thresholds):
    yes = (logit[mask] > thresholds[:, None]).float()
    hits = yes @ runs[mask].float()
    return torch.stack([hits / yes.sum(1), hits / runs[mask].sum()], 1)


def accuracy(logit, runs, mask, thresholds):
    right = ((logit[mask] > thresholds[:, None]) == runs[mask]).float().mean(1)
    return torch.stack([right, right], 1)


def mean_of_rows(logit, runs, mask, thresholds):
    rows = [solution(*row, thresholds) for row in zip(logit, runs, mask, strict=True)]
    return torch.stack(rows).mean(0)


def of_those_that_skip(logit, runs, mask, thresholds):
    return solution(logit, ~runs, mask, thresholds)


mutants = [at_least, mask_forgotten, mask_of_the_selected_forgotten, exchanged, transposed,
           nothing_by_nothing, accuracy, mean_of_rows, of_those_that_skip]
