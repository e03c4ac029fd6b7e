"""Supervised fine-tuning on the response tokens that serve the held-out rows, under DeepSpeed.

    deepspeed recipes/sft.py --config configs/sft/quickstart.yaml [section.key=value ...]

`--help` explains every key.
"""

from alphatoken.cli import readable_errors
from alphatoken.config.help import parse_arguments
from alphatoken.config.run import RunConfig


def main() -> None:
    with readable_errors():
        config = parse_arguments(
            RunConfig,
            "Supervised fine-tuning on the response tokens that serve the held-out rows, under "
            "DeepSpeed.",
        )

        # Imported here: torch and DeepSpeed take seconds, and a mistake in the configuration
        # should not wait for them.
        from alphatoken.objectives.supervised import SupervisedObjective
        from alphatoken.training.setup import build_run
        from alphatoken.training.trainer import Trainer

        Trainer(build_run(config, SupervisedObjective())).train()


if __name__ == "__main__":
    main()
