"""The passes that write a pruned graph; the pipeline that runs and verifies them."""

if __name__ != "vtprune_fx.passes":
    raise ImportError("import vtprune_fx.passes: a bare `passes` makes second classes")

from vtprune_fx.graph.insert import Inserter
from vtprune_fx.graph.stamps import CutNodes, Stamp, StampKind, cut_nodes
from vtprune_fx.graph.values import set_value
from vtprune_fx.passes.async_checks import AsyncChecks
from vtprune_fx.passes.base import Form, Pass, PassResult
from vtprune_fx.passes.check_tokens import CheckTokens
from vtprune_fx.passes.gather_tokens import GatherTokens
from vtprune_fx.passes.insert_scores import InsertScores
from vtprune_fx.passes.own_lengths import OwnLengths
from vtprune_fx.passes.pipeline import ExtraPass, Pipeline, Target, default_pipeline
from vtprune_fx.passes.read_rows import ReadRows
from vtprune_fx.passes.refresh_values import RefreshValues
from vtprune_fx.passes.share_attention import ShareAttention
from vtprune_fx.passes.shift_keys import ShiftKeys
from vtprune_fx.passes.verify import Verifier

__all__ = [
    "AsyncChecks",
    "CheckTokens",
    "CutNodes",
    "ExtraPass",
    "Form",
    "GatherTokens",
    "InsertScores",
    "Inserter",
    "OwnLengths",
    "Pass",
    "PassResult",
    "Pipeline",
    "ReadRows",
    "RefreshValues",
    "ShareAttention",
    "ShiftKeys",
    "Stamp",
    "StampKind",
    "Target",
    "Verifier",
    "cut_nodes",
    "default_pipeline",
    "set_value",
]
