"""Analysis: is attention low-dimensional, do layers share an eigenspace, and what do norms show that weights hide?

Plain functions on arrays (`pca`, `subspace_overlap`, `head_products`, …) and streaming accumulators
(`RowMoments`, `MatrixSample`, `NormMoments`) that `collect` fills from a live model in one pass.
"""

from approx_attn.diagnosis.analysis.collect import LayerStatistics, Statistics, collect
from approx_attn.diagnosis.analysis.moments import MatrixSample, RowMoments
from approx_attn.diagnosis.analysis.norms import NormMoments, head_products, summed_norms, transformed_norms
from approx_attn.diagnosis.analysis.overlap import (
    RandomOverlap,
    overlap_matrix,
    principal_cosines,
    random_overlap,
    subspace_overlap,
)
from approx_attn.diagnosis.analysis.projections import find_output_projections
from approx_attn.diagnosis.analysis.spectrum import Spectrum, centre_rows, pca, spectrum_of_covariance, spectrum_of_gram
from approx_attn.diagnosis.analysis.tokens import CATEGORIES, TokenCategories, random_tokens

__all__ = [
    "CATEGORIES",
    "LayerStatistics",
    "MatrixSample",
    "NormMoments",
    "RandomOverlap",
    "RowMoments",
    "Spectrum",
    "Statistics",
    "TokenCategories",
    "centre_rows",
    "collect",
    "find_output_projections",
    "head_products",
    "overlap_matrix",
    "pca",
    "principal_cosines",
    "random_overlap",
    "random_tokens",
    "spectrum_of_covariance",
    "spectrum_of_gram",
    "subspace_overlap",
    "summed_norms",
    "transformed_norms",
]
