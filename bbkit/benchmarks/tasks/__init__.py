"""Task files for lm-eval, `lm_eval --include_path`, and the functions that they name."""
