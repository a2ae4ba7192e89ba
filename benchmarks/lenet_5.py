"""LeNet-5 on MNIST; see mnist_lenets.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.mnist_lenets import main

if __name__ == "__main__":
    sys.argv.insert(1, "lenet_5")
    main()
