"""Ulysses: each rank holds a part of every sequence, except in attention, where it has some heads of the whole sequence."""
