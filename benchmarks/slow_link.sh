#!/bin/sh
# Runs a job of mpirun's on machines that are pretended on this one.
#
#   slow_link.sh MEGABYTES command ...
#
# The command starts mpirun; its hosts machine0, machine1, ... are network
# namespaces with names of their own, behind a switch: MPI finds no shared
# memory between them and takes TCP. Each sends and receives at most so many
# megabytes a second. All of it is gone with the command. Needs iproute2, and
# to be root or user namespaces.
set -e
PATH=$PATH:/usr/sbin:/sbin
here=$(realpath "$0")

limit() {
  tc qdisc add dev "$1" root tbf rate "${SLOW_LINK}mbps" burst 20kb limit 4mb
}

case $1 in
  switch)  # in the namespace of the switch, where mpirun is
    shift
    ip link set lo up
    ip link add switch mtu 9000 type bridge
    ip addr add 10.77.0.254/24 dev switch
    ip link set switch up
    export SLOW_LINK_SWITCH=$$ PRTE_MCA_plm_ssh_agent="sh $here host"
    exec "$@"
    ;;
  host)  # what mpirun takes for ssh: a host and a command
    shift
    exec unshare --net --uts sh "$here" machine "$@"
    ;;
  machine)  # in the namespace of a machine
    name=$2
    shift 2
    hostname "$name"
    ip link set lo up
    ip link add wire mtu 9000 type veth \
      peer name "$name" mtu 9000 netns "$SLOW_LINK_SWITCH"
    ip addr add "10.77.0.$((${name#machine} + 1))/24" dev wire
    ip link set wire up
    limit wire
    nsenter --target "$SLOW_LINK_SWITCH" --net sh "$here" plug "$name"
    exec sh -c "$*"
    ;;
  plug)  # the end of a machine's wire that is in the switch
    ip link set "$2" master switch up
    limit "$2"
    ;;
  *)
    export SLOW_LINK="$1"
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
