"""Calibration: streaming statistics of a live model, fitted to bases that mechanisms start from."""

from approx_attn.attention.eigen.basis_file import Calibration, LayerShape, load_basis_into
from approx_attn.attention.eigen.position_fit import PositionFit, fit_position_basis
from approx_attn.conversion.calibration.fitting import calibrate, needed_statistics
from approx_attn.conversion.calibration.matrix_moments import MatrixMoments
from approx_attn.conversion.calibration.moments import STATISTICS, ContentMoments, PositionMoments

__all__ = [
    "STATISTICS",
    "Calibration",
    "ContentMoments",
    "LayerShape",
    "MatrixMoments",
    "PositionFit",
    "PositionMoments",
    "calibrate",
    "fit_position_basis",
    "load_basis_into",
    "needed_statistics",
]
