"""Where in a transformer do several tasks interfere? A Lightning callback that answers per head."""

from qkov_lightning.capture.autograd_comparison import CaptureVerification, CellError
from qkov_lightning.capture.capture_check import verify_capture
from qkov_lightning.capture.samples import samples_from_positions, task
from qkov_lightning.capture.taps import CaptureWarning, GradientCapture
from qkov_lightning.drift.comparability import NotComparableError
from qkov_lightning.drift.drift import DriftReport, Finding, check_drift
from qkov_lightning.freezer import HeadFreezer
from qkov_lightning.heads.architectures import find_projections, register_architecture
from qkov_lightning.heads.inspection import describe
from qkov_lightning.heads.projections import Block, Projection, contiguous_heads
from qkov_lightning.heads.shapes import ArchitectureError
from qkov_lightning.heads.verification import CellCheck, Verification, verify_projections
from qkov_lightning.measure.encoding import HeatmapError
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.probe import probe_interference
from qkov_lightning.measure.subspace import ProtectedSubspace, SubspaceError, measure_subspace
from qkov_lightning.measure.verdict import PairVerdict, Verdict, judge
from qkov_lightning.monitor import InterferenceMonitor
from qkov_lightning.projector import HeadProjector
from qkov_lightning.scores.fisher import EmpiricalFisher
from qkov_lightning.scores.functional import head_interference, pair_harm, sample_pairs
from qkov_lightning.scores.metric import HeadInterference
from qkov_lightning.scores.resampling import PermutationTest, bootstrap_standard_error, permutation_test
from qkov_lightning.scores.settings import ScoreSettings
from qkov_lightning.store.cache import GradientCache
from qkov_lightning.store.files import CacheError
from qkov_lightning.store.processes import Processes
from qkov_lightning.views.loggers import register_logger

__version__ = "0.1.0"

__all__ = [
    "ArchitectureError",
    "Block",
    "CacheError",
    "CaptureVerification",
    "CaptureWarning",
    "CellCheck",
    "CellError",
    "DriftReport",
    "EmpiricalFisher",
    "Finding",
    "GradientCache",
    "GradientCapture",
    "HeadFreezer",
    "HeadInterference",
    "HeadProjector",
    "HeatmapError",
    "InterferenceHeatmap",
    "InterferenceMonitor",
    "NotComparableError",
    "PairVerdict",
    "PermutationTest",
    "Processes",
    "Projection",
    "ProtectedSubspace",
    "ScoreSettings",
    "SubspaceError",
    "Verdict",
    "Verification",
    "__version__",
    "bootstrap_standard_error",
    "check_drift",
    "contiguous_heads",
    "describe",
    "find_projections",
    "head_interference",
    "judge",
    "measure_subspace",
    "pair_harm",
    "permutation_test",
    "probe_interference",
    "register_architecture",
    "register_logger",
    "sample_pairs",
    "samples_from_positions",
    "task",
    "verify_capture",
    "verify_projections",
]
