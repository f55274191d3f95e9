"""The demo's model and data from the command line, configured by YAML.

python examples/train.py fit --config configs/train.yaml
python examples/train.py fit --config configs/base.yaml --config configs/interference.yaml
"""

from byte_model import TextTasks
from demo import ByteLanguageModel
from lightning.pytorch.cli import LightningCLI


def main() -> None:
    LightningCLI(ByteLanguageModel, TextTasks, seed_everything_default=0)


if __name__ == "__main__":
    main()
