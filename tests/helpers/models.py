"""Whether a model is as it was."""

import torch


def snapshot(model):
    """What conversion could change: the modules, their types, entries and modes."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    return modules, {key: value.clone() for key, value in model.state_dict().items()}, set(vars(model))


def assert_unchanged(model, before):
    modules, entries, attributes = snapshot(model)
    assert modules == before[0] and attributes == before[2]
    assert entries.keys() == before[1].keys()
    assert all(torch.equal(value, before[1][key]) for key, value in entries.items())
