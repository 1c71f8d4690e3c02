"""Lesson 3: a solution of its exercise, and wrong ones that its check must refuse."""
import torch


def kernel(T, sigma):
    t = torch.arange(T)
    return torch.exp(-(t[:, None] - t).square().double() / sigma)


def prices(score, exit_cost):
    return exit_cost * torch.arange(1, score.size(-1) + 1)


def solution(score, mask, exit_cost, sigma):
    smooth = kernel(score.size(1), sigma) @ score.masked_fill(~mask.unsqueeze(-1), 0)
    return (smooth - prices(score, exit_cost)).argmax(-1) + 1


def mask_forgotten(score, mask, exit_cost, sigma):
    return solution(score, torch.ones_like(mask), exit_cost, sigma)


def counted_from_zero(score, mask, exit_cost, sigma):
    return solution(score, mask, exit_cost, sigma) - 1


def not_smoothed(score, mask, exit_cost, sigma):
    return (score - prices(score, exit_cost)).masked_fill(~mask.unsqueeze(-1), 0).argmax(-1) + 1


def cost_smoothed_too(score, mask, exit_cost, sigma):
    return solution(score - prices(score, exit_cost), mask, 0, sigma)


def cost_added(score, mask, exit_cost, sigma):
    return solution(score, mask, -exit_cost, sigma)


def distance_not_squared(score, mask, exit_cost, sigma):
    t = torch.arange(score.size(1))
    weights = torch.exp(-(t[:, None] - t).abs().double() / sigma)
    smooth = weights @ score.masked_fill(~mask.unsqueeze(-1), 0)
    return (smooth - prices(score, exit_cost)).argmax(-1) + 1


def earlier_tokens_only(score, mask, exit_cost, sigma):
    smooth = kernel(score.size(1), sigma).tril() @ score.masked_fill(~mask.unsqueeze(-1), 0)
    return (smooth - prices(score, exit_cost)).argmax(-1) + 1


def highest_on_ties(score, mask, exit_cost, sigma):
    smooth = kernel(score.size(1), sigma) @ score.masked_fill(~mask.unsqueeze(-1), 0)
    return score.size(-1) - (smooth - prices(score, exit_cost)).flip(-1).argmax(-1)


mutants = [mask_forgotten, counted_from_zero, not_smoothed, cost_smoothed_too, cost_added,
           distance_not_squared, earlier_tokens_only, highest_on_ties]
