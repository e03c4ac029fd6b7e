"""Estimator `ghost`, the paper's: signals of the last layers' linears, contracted with the held-out
gradient and the drift.

To follow a value from beginning to end, read these five in this order. The code writes `act` for h,
a linear's input, (R, I), and `outgrad` for d, the loss gradient at its output, (R, O), of R
response positions; the band A is (B, T, W), G and V are (O, I), a term is (R,):

- `scorer`: drives; `refresh` takes in held-out rows, `score` values a batch.
- `tower`: runs the last layers forward and backward, one at a time, the last one first, each in a
  graph of its own, apart from the training graph.
- `signals`: what each linear saw, (h, d), and d mixed by the attention band.
- `held_out`: the held-out signals (h_v, d_v), kept as they are or summed up to slices of G
  (`outer_sums`), whichever is cheaper.
- `contract`: the equation, one linear at a time, and the sum over linears.

`training.step.OptimizerStep.take` has everything refreshed, then runs each micro-batch through
`training.valued_model`, which calls `score` in the middle of the forward pass and multiplies values
of a pair by how its objective depends on the response's losses (of SFT by 1).

What calls what before a step, for weights, V and the B of tokens scored earlier, and every
`refresh_every` steps (by default 1) for G and drawn B; where weights are streamed, `score` gathers
contractions:

    GhostScorer.refresh                                  the tower takes over the weights
      _take_in -> _collect -> Tower.run                  rows of all ranks, no causal path
        HeldOutSignals.add, reduce                       (h_v, d_v), or sum_v d_v h_v^T in slices
      _gather_contractions                               one `Contractions` for each linear
        contractions_with, Drift.matrices                G, B and D; V

and for one micro-batch:

    GhostScorer.score                                    one consumer per layer, which adds up terms
      Tower.run                                          chunks of whole sequences
        forward:   ChunkSignals.on_attention             A, from queries and keys
        backward:  SignalCapture -> ChunkSignals.of_linear      (h, d) and sum_k A[k,t] d_k
                     consumer -> TermSums.add -> contract       d^T G h, d^T V h, and the sums
      TermSums.values -> TokenValues.from_terms          terms where their positions are, times
                                                         (1, lambda), the `Scorer.part_weights`

Where c, which multiplies B, and lambda, which multiplies V, enter:

    split_terms: true (default)    both in TokenValues.from_terms, of sums over linears
    split_terms: false             c in GhostScorer._directions (G - c B is one contraction); lambda
                                   in _gather_contractions where that is one matrix, which lambda V
                                   is added to, else in contract_at_once

c enters D, too, in `_directions`, either way. Where the ranks' parts meet: `directions` makes G, B
and D whole from slices or signals, `outer_sums` reduces sums of outer products to slices. Not
needed: `scored_mean` (B of earlier steps).

Factors that arise elsewhere, each in one short function that does no more than this says:

- h and d, `passes.capture.SignalCapture`: hooks on each scored linear; h is its input in the
  forward pass, d what autograd brings back to its output.
- the losses, and the gradient of their sum behind the last layer, `passes.chunks.top_backward`:
  norm and head on response positions.
- A, `passes.attention.attention_band`: exp(score - log-sum-exp) of the next w queries, mean over
  heads. `mix_band`: sum_k A[k, t] d_k, of any later positions k; `signals` calls it at value
  projections only.
- V, `stability.drift.weighted_drift`: F * (W - W_ref), elementwise, in float32.
- d^T M h, `values.algebra.bilinear_products`: M h, times d, summed; `signals_product`: the same
  from signals, 1/N sum_v <d_t, d_v> <h_t, h_v>. Where G is a matrix, `HeldOutSignals.own_slice`
  divides by N, the held-out response positions of all ranks.
- (1, lambda), `Scorer.part_weights`: lambda is `valuation.stability_weight`; with `balance: std`
  both are divided by the running spread of their part.
"""
