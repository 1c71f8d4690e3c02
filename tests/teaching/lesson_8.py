"""Lesson 8: a solution of its exercise, and wrong ones that its check must refuse."""
import numpy as np


def solution(right):
    stays = np.cumprod(right[..., ::-1], -1).sum(-1)        # how many of the last exits in a row are right
    return np.minimum(right.shape[-1] - stays + 1, right.shape[-1])


def first_that_is_right(right):
    return np.where(right.any(-1), right.argmax(-1) + 1, right.shape[-1])


def counted_from_zero(right):
    return solution(right) - 1


def beyond_the_last(right):
    """One exit too many if the last one is wrong."""
    return right.shape[-1] - np.cumprod(right[..., ::-1], -1).sum(-1) + 1


def as_many_as_are_wrong(right):
    return np.minimum((~right).sum(-1) + 1, right.shape[-1])


def always_the_last(right):
    return np.full(right.shape[:-1], right.shape[-1])


mutants = [first_that_is_right, counted_from_zero, beyond_the_last, as_many_as_are_wrong, always_the_last]
