"""Loads and compiles what the ranks of a test need late, once, in the server that they are forked
from.

DeepSpeed and PyTorch import some 650 modules while the first engine is built, which takes each rank
seconds. Nothing is collected meanwhile, which would take a fifth of the time. `gc.freeze` takes
everything loaded here out of garbage collection, which DeepSpeed asks for in every engine it
builds: ranks do not walk through half a million objects again, and do not copy the memory pages
they share with the server.
"""

from __future__ import annotations

import gc
import importlib

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from alphatoken.report.page import page_template

MODULES = (
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.module_inject.auto_ep_presets",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "peft.utils.transformers_weight_conversion",
    "setuptools._distutils.ccompiler",
    "tests.cases",
    "torch._decomp.decompositions_for_jvp",
    "torch._dynamo.repro.after_dynamo",
    "torch._dynamo.testing",
    "torch._inductor.compile_fx",
    "torch._subclasses.schema_check_mode",
    "torch.export",
)

gc.disable()
for _name in MODULES:
    importlib.import_module(_name)
page_template()
get_checkpoint_conversion_mapping("llama")  # the first call compiles those of every model
gc.enable()
gc.collect()
gc.freeze()
