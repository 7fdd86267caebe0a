"""`autoseg compare`: which pretraining helps on these data, and how much.

`arms` says what is compared, `design` decides and keeps everything that is equal for all of it, `budget` forecasts, `run` does
it, `outcomes` reads what the runs left, `statistics` compares, `report` and `plots` show.
"""
