"""The exercise of lesson 5: a right answer, and wrong ones that its checker must refuse."""
import torch


def last_if_padding(weight, live):
    return weight.float().masked_fill(~live, -torch.inf)


def before(w, earlier=True):
    """w (B,T) -> how many tokens go before each."""
    larger, equal = w[:, None] > w[..., None], w[:, None] == w[..., None]           # (B,t,s)
    return (larger | (equal.tril(-1) if earlier else equal.triu(1))).sum(-1)


def ranked(weight, live):
    return last_if_padding(weight, live).argsort(dim=1, descending=True, stable=True)


def kth(weight, live, k):
    return last_if_padding(weight, live).sort(1, descending=True).values[:, k - 1:k]


def solution(weight, live, k):
    return live & (before(last_if_padding(weight, live)) < k)


def one_too_many(weight, live, k):
    return live & (before(last_if_padding(weight, live)) <= k)


def the_later_of_equal_ones(weight, live, k):
    return live & (before(last_if_padding(weight, live), earlier=False) < k)


def padding_counts(weight, live, k):
    return live & (before(weight) < k)


def padding_runs(weight, live, k):
    return torch.zeros_like(live).scatter(1, ranked(weight, live)[:, :k], True)


def all_that_equal_the_kth(weight, live, k):
    return live & (last_if_padding(weight, live) >= kth(weight, live, k))


def above_the_kth(weight, live, k):
    return live & (last_if_padding(weight, live) > kth(weight, live, k))


def argsort_taken_for_ranks(weight, live, k):
    return live & (ranked(weight, live) < k)


def across_rows(weight, live, k):
    return solution(weight.T, live.T, k).T


def places(weight, live, k):
    return ranked(weight, live)[:, :k]


mutants = [one_too_many, the_later_of_equal_ones, padding_counts, padding_runs,
           all_that_equal_the_kth, above_the_kth, argsort_taken_for_ranks, across_rows, places]
