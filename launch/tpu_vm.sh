#!/usr/bin/env bash
# {{name}}: {{slices}} slices of {{topology}} {{chip}} as Cloud TPU VMs, asked for through a queued resource.
#
#   bash tpu_vm.sh       asks for them, and again whenever they were taken away, until the run has ended; then gives
#                        them back. Stop it with Ctrl-C, and it can be started again: it finds what is there.
#
# Every machine starts the run by itself when it boots; JAX finds the others by the machines' metadata.
set -u
target=({{name}} --project={{project}} --zone={{zone}})

startup=$(mktemp)
trap 'rm -f "$startup"' EXIT
cat >"$startup" <<'END_OF_STARTUP'
#!/usr/bin/env bash
# Work directory and prepared text: a file system that all machines write.
mkdir -p {{shared}}
mountpoint -q {{shared}} || mount -t nfs {{nfs}} {{shared}} || {
  echo 2 >/var/tmp/opendeep.status # a setting to mend: the machines are given back
  exit
}
# --stop-timeout: from SIGTERM (the machine is taken away) to SIGKILL: time to finish a step and save.
# TPU_MIN_LOG_LEVEL: libtpu's log; 2 is errors only. Compiler options: --train.compiler_options, or LIBTPU_INIT_ARGS.
for ((start = 0; start <= {{restarts}}; start++)); do
  docker run --rm --name=opendeep-train --privileged --network=host --stop-timeout={{grace_seconds}} \
    --volume={{shared}}:{{shared}} --env=TPU_MIN_LOG_LEVEL=2 \
    {{image}} {{command}}
  status=$?
  case $status in
    0 | 2 | 3) break ;; # the end, a setting to mend, a diagnosis to read
  esac
  sleep 10 # 75 (told to stop, or lost a peer), killed, or crashed: the same again, from the last checkpoint
done
echo "$status" >/var/tmp/opendeep.status
END_OF_STARTUP

while :; do
  state=$(gcloud compute tpus queued-resources describe "${target[@]}" --format='value(state.state)' 2>/dev/null)
  case $state in
    "")
      gcloud compute tpus queued-resources create "${target[@]}" \
        --accelerator-type={{accelerator}} \
        {{spot}} \
        --runtime-version={{runtime_version}} \
        --node-id={{node_id}} \
        --node-count={{node_count}} \
        --node-prefix={{node_prefix}} \
        --metadata-from-file=startup-script="$startup" || exit
      ;;
    ACTIVE)
      ended=$(gcloud compute tpus tpu-vm ssh {{first_node}} "${target[@]:1}" --worker=0 \
        --command='cat /var/tmp/opendeep.status' </dev/null 2>/dev/null)
      if [[ $ended =~ ^[0-9]+$ ]]; then
        gcloud compute tpus queued-resources delete "${target[@]}" --force --quiet
        exit "$ended"
      fi
      ;;
    SUSPENDED | FAILED) # taken away: give the empty shell back and ask again
      gcloud compute tpus queued-resources delete "${target[@]}" --force --quiet || exit
      ;;
  esac
  sleep "${POLL_SECONDS:-60}"
done
