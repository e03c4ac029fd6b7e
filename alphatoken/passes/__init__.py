"""Running parts of a decoder outside the engine: captured states, streamed layers, attention bands.

A new pass takes its weights from `streamer.LayerStreamer` and its inputs from
`capture.EntryCapture`.
"""
