"""The ops inside other trainers: one module a trainer, which replaces the functions it names and puts them back.

Nothing is imported from a trainer before its module is asked for, and each checks the version it was written against.
"""
