"""Studies: which rule trains best, on which rows. `benchmarks.study` is the command; a study is one
YAML file in this folder, and its keys are in `settings`.

`rows` makes what is trained and measured on, `job` is one run in a process of its own, `measures`
says what a trained model is worth, and `tables` turns finished runs into a table and a picture.
"""
