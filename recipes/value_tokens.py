"""Values of every response token of a data set under one model, without training it.

    deepspeed recipes/value_tokens.py --config configs/sft/smollm2_gsm8k.yaml [key=value ...]

Takes the configuration of a run, of SFT or preference optimization, and writes Parquet files into
`selection.store`. A run trains by them with `selection.policy=stored`. `--help` explains every key.
"""

from alphatoken.cli import readable_errors
from alphatoken.config.help import parse_arguments
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig


def main() -> None:
    with readable_errors():
        description = "Values of every response token of a data set, without training."
        config = parse_arguments(
            RunConfig, description, with_section={"preference": PreferenceRunConfig}
        )

        # Imported here: torch and DeepSpeed take seconds, and a mistake in the configuration
        # should not wait for them.
        from alphatoken.training.valuing import run_valuing

        run_valuing(config)


if __name__ == "__main__":
    main()
