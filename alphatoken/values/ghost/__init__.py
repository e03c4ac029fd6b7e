"""Estimator `ghost`, the paper's: signals of the last layers' linears, contracted with the held-out
gradient and the drift.

To follow a value from beginning to end, read in this order:

- `scorer`: drives; `refresh` takes in held-out rows, `score` values a batch.
- `tower`: runs the last layers forward and backward, one at a time, the last one first, each in a
  graph of its own, apart from the training graph.
- `signals`: what each linear saw, (h, d), and d mixed by the attention band.
- `held_out`: the held-out signals (h_v, d_v), kept as they are or summed up to slices of G
  (`outer_sums`), whichever is cheaper.
- `directions`: what signals are contracted with, made whole from either.
- `contract`: the equation, one linear at a time, and the sum over linears.

What calls what, once a step, for G, B and V (`values.refresh` decides when):

    GhostScorer.refresh                                  the tower takes over the weights
      _take_in -> _collect -> Tower.run                  rows of all ranks, no causal path
        HeldOutSignals.add, reduce                       (h_v, d_v), or sum_v d_v h_v^T in slices
      _gather_contractions                               one `Contractions` for each linear
        contractions_with, Drift.matrices                G and B; V

and for one micro-batch:

    GhostScorer.score                                    one consumer per layer, which adds up terms
      Tower.run                                          chunks of whole sequences
        forward:   ChunkSignals.on_attention             A, from queries and keys
        backward:  SignalCapture -> ChunkSignals.of_linear      (h, d) and sum_k A[k,t] d_k
                     consumer -> TermSums.add -> contract       d^T G h, d^T V h
      TermSums.values -> TokenValues.from_terms          the sum over linears, (1, lambda) times it

`training.valued_model` calls `score` in the middle of a micro-batch's forward pass, and multiplies
values of a pair by how its objective depends on the response's losses (of SFT by 1).

Not needed for that: how `outer_sums` deals slices to ranks, `scored_mean` (B of earlier steps).

Factors that arise elsewhere: the products themselves (`values.algebra`), the hooks
(`passes.capture`), the top of the backward pass (`passes.chunks`), the attention band
(`passes.attention`), V (`stability.drift`).
"""
