"""What any program needs: files that are whole or not there, sentences for people, clocks,
progress; knows nothing of models.

A new helper belongs here only if it would make sense in another project; otherwise it belongs to
the package that needs it.
"""
