#!/usr/bin/env bash
# {{name}}: {{slices}} slices of {{topology}} {{chip}} as Cloud TPU VMs, asked for through a queued resource.
#
#   bash tpu_vm.sh       asks for them, and again whenever they were taken away, until the run has ended; then gives
#                        them back. Stop it with Ctrl-C, and it can be started again: it finds what is there.
#
# Every machine starts the run by itself when it boots; JAX finds the others by the machines' metadata. Nothing else is
# made here that costs: boot disks go with their machines. The file system behind {{nfs}} is yours, and stays.
set -u
target=({{name}} --project={{project}} --zone={{zone}})
machines=({{machines}})
request={{request}} # tells machines that were asked for with other settings or another topology

startup=$(mktemp) && said=$(mktemp) || exit
there=0 # whether machines, or a request for some, may be there
left="Machines may be there, and cost until they are given back. To look after them again: bash $0. To give them back:
gcloud compute tpus queued-resources delete ${target[*]} --force --quiet"
trap 'rm -f "$startup" "$said"; ((!there)) || echo "$left" >&2' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

cat >"$startup" <<'END_OF_STARTUP'
#!/usr/bin/env bash
# Work directory and prepared text: a file system that all machines write.
for ((try = 0; ; try++)); do
  mkdir -p {{shared}}
  mountpoint -q {{shared}} || mount -t nfs {{nfs}} {{shared}} && break
  ((try < 2)) || { echo 2 >/var/tmp/opendeep.status && exit; } # a setting to mend: the machines are given back
  sleep "${POLL_SECONDS:-3}"
done
newest() { # the number of the newest checkpoint
  find {{workdir}}/checkpoints -mindepth 1 -maxdepth 1 -name '[0-9]*' 2>/dev/null | sed 's:.*/::' | sort -n | tail -n 1
}
# --stop-timeout: from SIGTERM (the machine is taken away) to SIGKILL: time to finish a step and save.
# TPU_MIN_LOG_LEVEL: libtpu's log; 2 is errors only. Compiler options: --train.compiler_options, or LIBTPU_INIT_ARGS.
# OPENDEEP_JOB: by it a run counts the starts that got nowhere (opendeep_jax/cli/starts.py).
crashes=0
for ((start = 0; start <= {{restarts}}; start++)); do
  before=$(newest)
  docker run --rm --name=opendeep-train-$$-$start --privileged --network=host --stop-timeout={{grace_seconds}} \
    --volume={{shared}}:{{shared}} --env=TPU_MIN_LOG_LEVEL=2 --env=OPENDEEP_JOB={{name}} \
    --volume={{local}}:{{local}} \
    {{docker_env}} \
    {{image}} {{command}}
  status=$?
  most=2
  case $status in
    0 | 2 | 3 | 130) break ;;      # the end, a setting to mend, a diagnosis to read
    75 | 134 | 137 | 143) most=0 ;; # told to stop, lost a peer, killed, or aborted because process 0 is gone
    125) most=5 ;;                 # docker itself: a registry that does not answer
  esac
  # Crashed: once more, from the last checkpoint. Not when that got no further.
  if ((!most)) || [[ $(newest) != "$before" ]]; then crashes=0; fi
  ((!most || ++crashes < most)) || break
  sleep 10
done
echo "$status" >/var/tmp/opendeep.status
END_OF_STARTUP

pause() { sleep "${POLL_SECONDS:-60}" & wait $!; }

describe() { # state and request of what is there, nothing where there is nothing; fails where nobody knows
  gcloud compute tpus queued-resources describe "${target[@]}" \
    --format='value(state.state,tpu.nodeSpec[0].node.metadata.opendeep)' 2>"$said" || grep -qi 'NOT_FOUND' "$said"
}

give_back() { # fails where something may be left
  if gcloud compute tpus queued-resources delete "${target[@]}" --force --quiet; then there=0; fi
  ((!there)) || { state=$(describe) && [[ -z $state ]] && there=0; }
}

finish() { # gives everything back and ends with this status
  for ((try = 0; try < 10; try++)); do give_back && exit "$1" || pause; done
  exit "$1"
}

statuses() { # the telling one of the statuses that machines have written; none while the run goes on
  for machine in "${machines[@]}"; do
    gcloud compute tpus tpu-vm ssh "$machine" "${target[@]:1}" --worker=all --quiet \
      --command='cat /var/tmp/opendeep.status' </dev/null 2>/dev/null
  done | grep -xE '[0-9]+' | sed -E 's/^(2|3|130)$/9000&/' | sort -rn | head -n 1 | sed 's/^9000//'
}

unknown=0 refused=0 failed=0 requests=0 ended=
for (( ; ; )); do
  if ! answer=$(describe); then # what may be there stays looked after
    cat "$said" >&2
    ((there || ++unknown < 5)) || exit 2
    pause
    continue
  fi
  state='' asked=''
  read -r state asked <<<"$answer"
  [[ -z $state ]] || there=1 refused=0
  case $state in
    "")
      ((requests <= {{restarts}})) || finish 75
      there=1
      if gcloud compute tpus queued-resources create "${target[@]}" \
        --accelerator-type={{accelerator}} \
        {{spot}} \
        --runtime-version={{runtime_version}} \
        --node-id={{node_id}} \
        --node-count={{node_count}} \
        --node-prefix={{node_prefix}} \
        --metadata=opendeep=$request \
        --metadata-from-file=startup-script="$startup" 2>"$said"; then
        ((++requests))
      else # what passes is tried again, and nothing else
        cat "$said" >&2
        grep -qiE 'ALREADY_EXISTS|UNAVAILABLE|DEADLINE|INTERNAL|ABORTED|EXHAUSTED|timed? ?out|connect|try again' "$said" &&
          ((++refused < 5)) || finish 2
      fi
      ;;
    ACTIVE)
      failed=0 last=$ended ended=$(statuses)
      ended=${ended:-$last}
      if [[ -n $asked && $asked != "$request" ]]; then # other settings or another topology: not this file's run
        [[ -n $ended ]] || { echo "The run of another file still goes on in machines of this name." >&2 && exit 2; }
        give_back && ended=
      elif [[ -n $ended && ($ended != 0 || -n $last) ]]; then # where one is done, the others have one more turn
        finish "$ended"
      fi
      ;;
    SUSPENDED | FAILED) # taken away, or never made: give the empty shell back and ask again
      ended=
      if [[ $state == FAILED ]]; then
        gcloud compute tpus queued-resources describe "${target[@]}" --format='yaml(state)' >&2
        ((++failed < 3)) || finish 2
      fi
      give_back
      ;;
  esac
  pause
done
