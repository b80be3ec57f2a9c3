#!/bin/sh
# Runs a job of mpirun's on machines that are pretended on this one.
#
#   slow_link.sh MEGABYTES[,MILLISECONDS] command ...
#
# The command starts mpirun; its hosts machine0, machine1, ... are network
# namespaces with names of their own, behind a switch: MPI finds no shared
# memory between them and takes TCP. Each sends and receives at most so many
# megabytes a second, and each message takes so many milliseconds more, which
# delaying_switch.py waits. All of it is gone with the command. Needs iproute2,
# and to be root or user namespaces; with a delay also root's raw sockets.
set -e
PATH=$PATH:/usr/sbin:/sbin
here=$(realpath "$0")

limit() {
  tc qdisc add dev "$1" root tbf rate "${SLOW_LINK}mbps" burst 64kb limit 16mb
}

case $1 in
  switch)  # in the namespace of the switch, where mpirun is
    shift
    ip link set lo up
    if [ -n "$SLOW_LINK_DELAY" ]; then
      ip link add switch mtu 9000 type veth peer name uplink mtu 9000
      ip link set uplink up
      python3 "$(dirname "$here")/delaying_switch.py" "$SLOW_LINK_DELAY" &
    else
      ip link add switch mtu 9000 type bridge
    fi
    ip addr add 10.77.0.254/24 dev switch
    ip link set switch up
    export SLOW_LINK_SWITCH=$$ PRTE_MCA_plm_ssh_agent="sh $here host"
    exec "$@"
    ;;
  host)  # what mpirun takes for ssh: a host and a command
    shift
    exec unshare --net --uts --mount sh "$here" machine "$@"
    ;;
  machine)  # in the namespace of a machine
    name=$2
    shift 2
    hostname "$name"
    # Gloo looks up the address of its own host by name.
    mount --bind "$(dirname "$here")/slow_link_hosts" /etc/hosts 2> /dev/null || true
    ip link set lo up
    ip link add wire mtu 9000 type veth \
      peer name "$name" mtu 9000 netns "$SLOW_LINK_SWITCH"
    ip addr add "10.77.0.$((${name#machine} + 1))/24" dev wire
    ip link set wire up
    limit wire
    # A link of 1 Gbit/s and 20 ms holds 5 MB, more than the kernel's buffers.
    for setting in "tcp_rmem=4096 1048576 67108864" \
      "tcp_wmem=4096 1048576 67108864" tcp_slow_start_after_idle=0; do
      echo "${setting#*=}" > "/proc/sys/net/ipv4/${setting%%=*}" || true
    done 2> /dev/null
    nsenter --target "$SLOW_LINK_SWITCH" --net sh "$here" plug "$name"
    exec sh -c "$*"
    ;;
  plug)  # the end of a machine's wire that is in the switch
    [ -n "$SLOW_LINK_DELAY" ] || ip link set "$2" master switch
    ip link set "$2" up
    limit "$2"
    ;;
  *)
    export SLOW_LINK="${1%,*}" SLOW_LINK_DELAY=
    case $1 in *,*) SLOW_LINK_DELAY=${1#*,} ;; esac
    shift
    for user in "" "--user --map-root-user"; do
      # shellcheck disable=SC2086
      if unshare $user --net true 2> /dev/null; then
        exec unshare $user --net sh "$here" switch "$@"
      fi
    done
    echo "slow_link.sh: unshare --user --net is not permitted here." >&2
    exit 1
    ;;
esac
