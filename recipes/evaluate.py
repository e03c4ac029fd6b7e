"""What a model can do: losses, choices among answers, generated answers, programs, each with its
interval.

    deepspeed recipes/evaluate.py --config configs/evaluation/smollm2.yaml [section.key=value ...]

Takes a file with sections `model` and `evaluation`, or the configuration of a run with a section
`evaluation`, and writes a JSON file that another evaluation can be compared with item by item.
`--help` explains every key.
"""

from alphatoken.cli import readable_errors
from alphatoken.config.evaluating import EvaluationRunConfig
from alphatoken.config.help import parse_arguments
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig


def main() -> None:
    with readable_errors():
        description = "What a model can do: losses, choices, answers and programs."
        config: RunConfig = parse_arguments(
            EvaluationRunConfig, description, with_section={"preference": PreferenceRunConfig}
        )

        # Imported here: torch and DeepSpeed take seconds, and a mistake in the configuration
        # should not wait for them.
        from alphatoken.evaluation.evaluate import run_evaluation

        run_evaluation(config)


if __name__ == "__main__":
    main()
