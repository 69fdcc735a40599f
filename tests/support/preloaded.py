"""What takes the time of a short run, done once in the process from which the ranks of tests are forked.

DeepSpeed is most of it, whichever engine is chosen; it also asks a compiler which of its extensions could be built.
"""

from __future__ import annotations

import deepspeed.ops
import deepspeed.ops.op_builder.all_ops
import pyarrow

import megatron_opus.backends.model.gpt
import megatron_opus.training.main
import megatron_opus.training.session  # noqa: F401

assert deepspeed.ops.__compatible_ops__  # found out at the first look
pyarrow.array([0.0])  # imports pandas where it is installed
