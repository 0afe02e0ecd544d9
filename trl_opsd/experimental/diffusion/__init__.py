# SPDX-License-Identifier: Apache-2.0
"""Self-distillation of masked-diffusion language models: d-OPSD (arXiv 2606.18195)."""
