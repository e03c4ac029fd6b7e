"""The diagonal Fisher of the model a run will start from, under DeepSpeed; takes the run's own
configuration, of SFT or preference optimization.

    deepspeed recipes/fisher.py --config configs/sft/smollm2_gsm8k.yaml [fisher.key=value ...]

A training run does the same by itself where `valuation.fisher` is not set. `--help` explains every
key.
"""

from alphatoken.cli import readable_errors
from alphatoken.config import RunConfig
from alphatoken.config_file import parse_arguments
from alphatoken.config_preference import PreferenceRunConfig
from alphatoken.estimation import run_fisher


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
