"""Ulysses: each rank holds a part of every sequence, except in attention, where it holds some heads of all of it."""
