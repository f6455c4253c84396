#!/usr/bin/env bash
# Trains a model on the embedded grammar, evaluates it and plots: about seven minutes on
# two CPU cores. Arguments, such as --config.train.total_steps=100, are passed to all
# three commands. --workdir or the variable WORKDIR sets the run's directory.
. "$(dirname "$0")/setup.sh"
# shellcheck disable=SC2119
setup
workdir=${WORKDIR:-runs/quickstart}
config=(--config configs/grammar.py)
for argument in "$@"; do
  case $argument in --config | --config=*) config=() ;; esac
done
dlm() {
  .venv/bin/python -m dlm_jax.main --workdir "$workdir" ${config[@]+"${config[@]}"} "$@"
}
dlm "$@"
dlm "$@" --mode evaluate
dlm "$@" --mode plot
