#!/usr/bin/env bash
# Trains the embedded default, evaluates it and prints samples: the whole of it in
# about seven minutes on two cores. Arguments go to all three commands, such as
# --config.train.total_steps=100; --workdir or the variable WORKDIR names the run.
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
