"""Supervised fine-tuning on the valuable response tokens, under DeepSpeed.

    deepspeed recipes/sft.py --config configs/sft/quickstart.yaml [section.key=value ...]

`--help` explains every key.
"""

from alphatoken.cli import readable_errors
from alphatoken.config import RunConfig
from alphatoken.config_file import parse_arguments
from alphatoken.losses import SupervisedObjective
from alphatoken.training import Trainer


def main() -> None:
    with readable_errors():
        config = parse_arguments(
            RunConfig, "Supervised fine-tuning on the valuable response tokens, under DeepSpeed."
        )
        Trainer(config, SupervisedObjective()).run()


if __name__ == "__main__":
    main()
