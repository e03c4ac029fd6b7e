"""Estimator `ghost`, the paper's: signals of the last layers' linears, contracted with the held-out
gradient and the drift.

To follow a value from beginning to end, read in this order:

- `scorer`: drives; `refresh` takes in held-out rows, `score` values a batch.
- `tower`: runs the last layers forward and backward, one at a time, the last one first, apart from
  the training graph.
- `signals`: what each linear saw, (h, d), and d mixed by the attention band.
- `held_out`: the held-out signals (h_v, d_v), kept as they are or summed up to slices of G,
  whichever is cheaper; `directions` makes whole contractions of either.
- `contract`: the equation, one linear at a time, and the sum over linears.

What calls what, for one micro-batch:

    GhostScorer.score                                    one consumer per layer, which adds up terms
      Tower.run                                          chunks of whole sequences
        forward:   ChunkSignals.on_attention             A, from queries and keys
        backward:  SignalCapture -> ChunkSignals.signals_of     (h, d) and sum_k A[k,t] d_k
                     consumer -> TermSums.add -> contract       d^T G h, d^T V h
      TermSums.values -> TokenValues.from_terms          the sum over linears, (1, lambda) times it

`training.valued_model` calls `score` in the middle of a micro-batch's forward pass, and multiplies
values of a pair by how its objective depends on the response's losses (of SFT by 1).

Not needed for that: `outer_sums` (sums in slices of ranks), `scored_mean` (B of earlier steps).

Factors that arise elsewhere: the products themselves (`values.algebra`), the hooks
(`passes.capture`), the top of the backward pass (`passes.chunks`), the attention band
(`passes.attention`), V (`stability.drift`).
"""
