"""What brings a run's scorer up to date."""

from __future__ import annotations

from alphatoken.training.feed import Feed
from alphatoken.training.setup import Run
from alphatoken.values.refresh import HeldOutRefresh


def held_out_refresh(run: Run, feed: Feed) -> HeldOutRefresh | None:
    """The refresh of a run's scorer with the held-out and contrast rows of its feed; None where
    tokens are not valued."""
    scorer, config = run.model.scorer, run.config.valuation
    if scorer is None:
        return None
    return HeldOutRefresh(
        scorer=scorer,
        draw=feed.held_out,
        draw_contrast=feed.contrast,
        every=config.refresh_every,
        start=config.start_step,
        adam_scale=run.adam_scale,
        first_moment=scorer.first_moment,
        coefficients=run.objective.coefficients if config.target == "preference" else None,
    )
