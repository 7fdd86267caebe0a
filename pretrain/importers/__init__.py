"""Weights of other projects, recognised by what a file holds and put in the terms of the networks built here."""
