"""The diagonal Fisher of the model a run will start from, under DeepSpeed; takes the run's own configuration.

    deepspeed recipes/fisher.py --config configs/sft/smollm2_gsm8k.yaml [fisher.key=value ...]

A training run does the same by itself where `valuation.fisher` is not set. `--help` explains every key.
"""

from alphatoken.cli import readable_errors
from alphatoken.config import RunConfig
from alphatoken.config_file import parse_arguments
from alphatoken.estimation import run_fisher


def main() -> None:
    with readable_errors():
        run_fisher(parse_arguments(RunConfig, "The diagonal Fisher of the model a run will start from."))


if __name__ == "__main__":
    main()
