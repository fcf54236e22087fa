"""`python -m scripts.cifar10 FOLDER`: the comparison of docs/cifar10.md from run folders, complete or not."""
