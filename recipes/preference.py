"""Preference optimization (the DPO family) on the valuable tokens of pairs of responses, under
DeepSpeed.

    deepspeed recipes/preference.py --config configs/preference/smollm2_hh_rlhf.yaml
    [section.key=value ...]

`--help` explains every key.
"""

from alphatoken.cli import readable_errors
from alphatoken.config.help import parse_arguments
from alphatoken.config.preference import PreferenceRunConfig


def main() -> None:
    with readable_errors():
        description = (
            "Preference optimization on the valuable tokens of pairs of responses, under DeepSpeed."
        )
        config = parse_arguments(PreferenceRunConfig, description)

        # Imported here: torch and DeepSpeed take seconds, and a mistake in the configuration
        # should not wait for them.
        from alphatoken.objectives.preference import PreferenceObjective
        from alphatoken.training.setup import build_run
        from alphatoken.training.trainer import Trainer

        Trainer(build_run(config, PreferenceObjective(config.preference))).train()


if __name__ == "__main__":
    main()
