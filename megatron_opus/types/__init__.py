"""What the rooms say to each other: protocols and small records, no behaviour."""

from megatron_opus.config import Geometry
from megatron_opus.types.engine import (
    MicrobatchRunner,
    ScoringMicrobatch,
    StepResult,
    TrainEngine,
)
from megatron_opus.types.layers import (
    AdamHyper,
    Fragment,
    Groups,
    Hyper,
    MuonHyper,
    OptimizerState,
    Ranges,
    Routing,
    ScoredLayer,
    SgdHyper,
)
from megatron_opus.types.strategy import (
    Selection,
    SelectionStrategy,
    SignalName,
    Signals,
)
from megatron_opus.types.tokens import (
    Batch,
    Candidates,
    TokenDocuments,
)

__all__ = [
    "AdamHyper",
    "Batch",
    "Candidates",
    "Fragment",
    "Geometry",
    "Groups",
    "Hyper",
    "MicrobatchRunner",
    "MuonHyper",
    "OptimizerState",
    "Ranges",
    "Routing",
    "ScoredLayer",
    "ScoringMicrobatch",
    "Selection",
    "SelectionStrategy",
    "SgdHyper",
    "SignalName",
    "Signals",
    "StepResult",
    "TokenDocuments",
    "TrainEngine",
]
