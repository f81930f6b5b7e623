#!/usr/bin/env bash
# {{name}}: {{processes}} processes on this machine, which find each other as those of several machines would.
#
# `opendeep launch --target=local` does the same, and also divides cores or GPUs, ends those whose peer is gone, and
# dies with the terminal. Exit status 75 says "start the same command again"; anything else is final.
set -u
stopped=0
children=()
trap 'stopped=1; kill -TERM "${children[@]}" 2>/dev/null' TERM INT # each finishes its step, saves and ends with 75
export OPENDEEP_JOB=local-$$                                       # by which a run counts the starts that got nowhere

for ((start = 0; start <= {{restarts}}; start++)); do
  port=$((20000 + RANDOM % 10000)) # a new one each time: the last start's may not be free yet
  children=()
  for ((id = 0; id < {{processes}}; id++)); do
    OPENDEEP_COORDINATOR_ADDRESS=127.0.0.1:$port OPENDEEP_NUM_PROCESSES={{processes}} OPENDEEP_PROCESS_ID=$id \
      {{command}} &
    children+=($!)
  done
  ((!stopped)) || kill -TERM "${children[@]}" 2>/dev/null # told between two starts
  final=0 killed=0 error=0 again=0
  for child in "${children[@]}"; do
    wait "$child" && ended=0 || ended=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the child has ended
      wait "$child" && ended=0 || ended=$?
    done
    case $ended in
      0) ;;
      2 | 3 | 130) final=$ended ;; # whatever the others end with: starting again is no cure
      75) again=1 ;;
      *) ((ended > 128)) && killed=1 || error=$ended ;; # a killed peer explains an error of another
    esac
  done
  status=0
  ((!again)) || status=75
  ((!error)) || status=$error
  ((!killed)) || status=75
  ((!final)) || status=$final
  ((status == 75 && !stopped)) || exit "$status"
done
exit 75
