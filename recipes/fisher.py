"""The diagonal Fisher of the model a run will start from, under DeepSpeed; takes the run's own
configuration, of SFT or preference optimization.

    deepspeed recipes/fisher.py --config configs/sft/smollm2_gsm8k.yaml [fisher.key=value ...]

A training run does the same by itself where `valuation.fisher` is not set. `--help` explains every
key.
"""

from alphatoken.cli import readable_errors
from alphatoken.config.help import parse_arguments
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig


def main() -> None:
    with readable_errors():
        description = "The diagonal Fisher of the model a run will start from."
        config = parse_arguments(
            RunConfig, description, with_section={"preference": PreferenceRunConfig}
        )

        # Imported here: torch and DeepSpeed take seconds, and a mistake in the configuration
        # should not wait for them.
        from alphatoken.stability.estimate import run_fisher

        run_fisher(config)


if __name__ == "__main__":
    main()
