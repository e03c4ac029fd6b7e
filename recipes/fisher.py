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
from alphatoken.stability.estimate import run_fisher


def main() -> None:
    with readable_errors():
        description = "The diagonal Fisher of the model a run will start from."
        run_fisher(
            parse_arguments(
                RunConfig, description, with_section={"preference": PreferenceRunConfig}
            )
        )


if __name__ == "__main__":
    main()
