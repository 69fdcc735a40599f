"""Puts a `Selector` into Megatron-LM's loop: a few functions of megatron.training.training are wrapped, none replaced.

setup_model_and_optimizer            arguments that cannot be scored are refused before a model is built
load_checkpoint, save_checkpoint     our state lies beside Megatron's
get_train_valid_test_num_samples     as many train samples as N candidates a step need
build_train_valid_test_datasets      the datasets are built on every rank
build_pretraining_data_loader        the train loader gives what was selected
train_step                           selection before it, the record after it
evaluate, evaluate_and_print_results validation losses go into the record as well
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_opus.backends.engines.megatron import training_loop
from megatron_opus.integrations.megatron_lm import settings
from megatron_opus.integrations.megatron_lm.checks import check_arguments, check_names
from megatron_opus.integrations.megatron_lm.run import current_rate
from megatron_opus.integrations.megatron_lm.selector import Selector
from megatron_opus.integrations.megatron_lm.settings import HookConfig

Original = Callable[..., Any]


@contextlib.contextmanager
def selecting(config: HookConfig | str | Path) -> Iterator[Selector]:
    """Select the training data of every `pretrain()` that runs inside the block.

    `config` is an opus.yaml or what was read from one. Raises ConfigError for it, and UnsupportedRelease for a release
    of Megatron-LM whose functions are other ones than those that are wrapped.
    """
    training: Any = importlib.import_module("megatron.training.training")
    check_names(training)
    selector = Selector(config if isinstance(config, HookConfig) else settings.load(config))
    wrappers = _wrappers(selector, training)
    originals = {name: getattr(training, name) for name in wrappers}
    for name, wrapper in wrappers.items():
        setattr(training, name, functools.wraps(originals[name])(functools.partial(wrapper, originals[name])))
    try:
        yield selector
    finally:
        for name, original in originals.items():
            setattr(training, name, original)
        selector.close()


def _wrappers(selector: Selector, training: Any) -> dict[str, Callable[..., Any]]:
    """Name -> wrapper(original, arguments of the original)."""

    def setup_model_and_optimizer(original: Original, *args: Any, **kwargs: Any) -> Any:
        check_arguments(training.get_args(), selector.config.selection)
        return original(*args, **kwargs)

    def load_checkpoint(original: Original, *args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        selector.loaded(training.get_args().load, loaded[0])
        return loaded

    def save_checkpoint(original: Original, iteration: int, *args: Any, **kwargs: Any) -> Any:
        selector.save(training.get_args().save, iteration)
        return original(iteration, *args, **kwargs)

    def get_train_valid_test_num_samples(original: Original) -> Any:
        train, *others = original()
        return (selector.train_samples(train, training.get_args().train_iters), *others)

    def build_train_valid_test_datasets(original: Original, *args: Any, **kwargs: Any) -> Any:
        with training_loop.datasets_on_every_rank() as alone:
            train, valid, test = original(*args, **kwargs)
        selector.take(train, valid)
        # Megatron itself reads on some ranks only, and starts workers where it has a dataset
        return (train, valid, test) if all(alone) else (None, None, None)

    def build_pretraining_data_loader(original: Original, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return selector.iterator() if selector.is_train(dataset) else original(dataset, *args, **kwargs)

    def train_step(
        original: Original,
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        *args: Any,
        **kw: Any,
    ) -> Any:
        step = selector.before(training.get_args(), forward_step_func, model, optimizer)
        rate = current_rate(optimizer)
        result = original(step, data_iterator, model, optimizer, *args, **kw)
        selector.after(result, rate, training.get_tensorboard_writer())
        return result

    testing = [False]

    def evaluate_and_print_results(original: Original, prefix: str, *args: Any, **kwargs: Any) -> Any:
        testing[0] = "test set" in prefix
        return original(prefix, *args, **kwargs)

    def evaluate(original: Original, *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if not testing[0]:
            selector.evaluated(found[0] or {})
        return found

    return {
        function.__name__: function
        for function in (
            setup_model_and_optimizer,
            load_checkpoint,
            save_checkpoint,
            get_train_valid_test_num_samples,
            build_train_valid_test_datasets,
            build_pretraining_data_loader,
            train_step,
            evaluate_and_print_results,
            evaluate,
        )
    }
