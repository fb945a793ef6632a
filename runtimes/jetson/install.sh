#!/usr/bin/env bash
# Installs edgeprune on a Jetson. Everything is checked first, the files are put in place in one step.
set -euo pipefail

usage() {
    cat << 'END'
Usage: install.sh [OPTIONS]

  Install edgeprune on a Jetson with JetPack 6.1 or newer.

Options:
  --prefix DIR       Where it goes, a folder of its own.  [default: /opt/edgeprune]
  --root DIR         Install into a Jetson's file system that lies under DIR, such as the
                     Linux_for_Tegra/rootfs of a host that flashes.
  --plugin CHOICE    The TensorRT plugin: auto (where it can be had), on (or end), off.
                     [default: auto]
  --check            Only look, and say what does not fit.
  --uninstall        Remove what an earlier call installed into the prefix.
  -h, --help         Show this message and exit.
END
}

say() { printf '%s\n' "$1"; }
fail() {
    printf 'install.sh: %s\n' "$1" >&2
    exit 1
}
# A thing that does not fit: said at once, and the end after all have been said.
misfits=0
misfit() {
    printf 'install.sh: %s\n' "$1" >&2
    misfits=$((misfits + 1))
}
# Whether version $1 is $2 or newer.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

prefix=/opt/edgeprune root= plugin=auto task=install
while [ $# -gt 0 ]; do
    case $1 in
        --prefix | --root | --plugin)
            [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value: see --help"
            case $1 in
                --prefix) prefix=${2%/} ;;
                --root) root=${2%/} ;;
                --plugin) plugin=$2 ;;
            esac
            shift ;;
        --check) task=check ;;
        --uninstall) task=uninstall ;;
        -h | --help) usage; exit 0 ;;
        *) fail "unknown option $1: see --help" ;;
    esac
    shift
done
case $plugin in auto | on | off) ;; *) fail "--plugin is auto, on or off, not '$plugin'" ;; esac
case $prefix in /?*) ;; *) fail "--prefix must be a whole path such as /opt/edgeprune, not '$prefix'" ;; esac
if [ -n "$root" ]; then
    root=$(cd "$root" 2> /dev/null && pwd) || fail "--root is no folder: give the root of a Jetson's file system"
fi

source=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=$root$prefix
# In the prefix: the files of the installation, one a line. What it does not name is not ours.
list=share/edgeprune/installed.txt

strangers() { (cd "$target" && find . ! -type d | sed 's|^\./||' | LC_ALL=C sort | LC_ALL=C comm -23 - <(LC_ALL=C sort "$list")); }

uninstall() {
    [ -f "$target/$list" ] || fail "$target has no installation of edgeprune: correct --prefix"
    [ -w "$target" ] || fail "$target cannot be written: run with sudo"
    local file
    while IFS= read -r file; do
        [ "$file" = "$list" ] || rm -f "$target/$file"
    done < "$target/$list"
    rm -f "$target/$list"
    find "$target" -depth -type d -empty -delete
    if [ -e "$target" ]; then
        say "removed; $target stays, it holds files that were not installed"
    else
        say "removed $target"
    fi
}

if [ "$task" = uninstall ]; then
    uninstall
    exit 0
fi

# --- The package ----------------------------------------------------------------------------------------------

[ -f "$source/SHA256SUMS" ] || fail "SHA256SUMS is missing beside install.sh: unpack the archive again"
(cd "$source" && sha256sum --quiet --strict --check SHA256SUMS > /dev/null 2>&1) \
    || fail "a file of the package is damaged or missing: unpack the archive again"
version=$(sed -n '1s/.* \([0-9.]*\) for Jetson$/\1/p' "$source/README.md")

# --- The machine ----------------------------------------------------------------------------------------------

# The version of an installed Debian package, empty if it is not installed.
installed() {
    [ -f "$root/var/lib/dpkg/status" ] || return 0
    awk -v name="$1" -v RS= -F '\n' '{
        package = state = version = ""
        for (i = 1; i <= NF; i++) {
            if ($i ~ /^Package: /) package = substr($i, 10)
            if ($i ~ /^Status: /) state = substr($i, 9)
            if ($i ~ /^Version: /) version = substr($i, 10)
        }
        if (package == name && state ~ / installed$/) { print version; exit }
    }' "$root/var/lib/dpkg/status"
}

machine=$(uname -m)
if [ -n "$root" ]; then
    machine=another
    [ ! -e "$root/lib/ld-linux-aarch64.so.1" ] || machine=aarch64
fi
[ "$machine" = aarch64 ] || misfit "this machine is $machine, the package is for aarch64: install it on the Jetson, or into its file system with --root"

# /etc/nv_tegra_release says "# R36 (release), REVISION: 4.3, …", nvidia-l4t-core is 36.4.3-….
l4t=
if [ -f "$root/etc/nv_tegra_release" ]; then
    l4t=$(sed -n '1s/^# R\([0-9]*\) (release), REVISION: \([0-9.]*\).*/\1.\2/p' "$root/etc/nv_tegra_release")
fi
if [ -z "$l4t" ]; then
    l4t=$(installed nvidia-l4t-core)
    l4t=${l4t%%-*}
fi
if [ -z "$l4t" ]; then
    misfit "this is no Jetson: neither /etc/nv_tegra_release nor the package nvidia-l4t-core says a release of Jetson Linux (on another aarch64 machine the unpacked folder runs as it is)"
elif ! at_least "$l4t" 36.4; then
    misfit "Jetson Linux $l4t is older than 36.4 (JetPack 6.1): flash JetPack 6.1 or newer"
elif ! at_least "$l4t" 37; then
    say "Jetson Linux $l4t: JetPack 6, CUDA 12"
else
    say "Jetson Linux $l4t: JetPack 7 or newer, CUDA 13 or newer"
fi

libc=$(installed libc6)
if [ -n "$libc" ] && ! at_least "$libc" 2.35; then
    misfit "glibc is ${libc%%-*}, the package needs 2.35 (Ubuntu 22.04): flash JetPack 6.1 or newer"
fi
libstdcxx=$(installed libstdc++6)
if [ -n "$libstdcxx" ] && ! at_least "$libstdcxx" 12; then
    misfit "libstdc++6 is $libstdcxx, the package needs that of GCC 12: run sudo apt-get update && sudo apt-get install libstdc++6"
fi

# --- The plugin -----------------------------------------------------------------------------------------------

tensorrt=
for file in "$root"/usr/lib/aarch64-linux-gnu/libnvinfer.so.*.*.*; do
    [ ! -e "$file" ] || tensorrt=${file##*/libnvinfer.so.}
done
compiled=share/edgeprune/plugins/compiled/libedgeprune_tensorrt.so

# The major version of the TensorRT whose headers a plugin was compiled with.
built_for() { grep -aoE 'TensorRT [0-9]+\.[0-9]+; CUDA' "$1" | sed -n '1s/TensorRT \([0-9]*\).*/\1/p'; }

# Why the plugin cannot be had is in $without; how, in $how.
how='' without=
choose_plugin() {
    local nvcc
    local chip=$root/proc/device-tree/compatible
    if [ -f "$chip" ] && ! grep -aq tegra234 "$chip"; then
        without="this board is no Orin, whose kernels (sm_87) the plugin has: engines need a bundle built with --plugin off"
        return
    fi
    if [ -z "$tensorrt" ]; then
        without="TensorRT (libnvinfer) was not found: sudo apt-get install nvidia-jetpack, then install again"
        return
    fi
    say "TensorRT $tensorrt"
    if ! at_least "$tensorrt" 10.3; then
        without="TensorRT $tensorrt is older than 10.3: flash JetPack 6.1 or newer"
        return
    fi
    if [ -f "$source/$compiled" ] && [ -n "$l4t" ] && at_least "$l4t" 37; then
        # A runtime of CUDA 13 is inside, for which the driver of JetPack 6 is too old.
        if [ "$(built_for "$source/$compiled")" = "${tensorrt%%.*}" ]; then
            how=compiled
            say "plugin: the compiled one, for TensorRT ${tensorrt%%.*}"
            return
        fi
    fi
    if [ -n "$root" ]; then
        without="the plugin has to be compiled on the Jetson: run install.sh there again"
        return
    fi
    nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
    if [ ! -x "$nvcc" ]; then
        without="nvcc was not found: sudo apt-get install nvidia-jetpack, then install again"
    elif ! command -v cmake > /dev/null || ! command -v c++ > /dev/null; then
        without="cmake or a C++ compiler was not found: sudo apt-get install cmake g++, then install again"
    elif [ -z "$(find "${TENSORRT_ROOT:-/usr}/include" -maxdepth 2 -name NvInferRuntime.h 2> /dev/null)" ]; then
        without="TensorRT's headers were not found: sudo apt-get install libnvinfer-headers-dev, or set TENSORRT_ROOT to the folder of a TensorRT, then install again"
    else
        how=compile
        say "plugin: compiled here for TensorRT $tensorrt"
    fi
}
if [ "$plugin" != off ] && [ $misfits -eq 0 ]; then
    choose_plugin
    if [ -n "$without" ]; then
        if [ "$plugin" = on ]; then
            misfit "$without"
        else
            say "no plugin: $without"
        fi
    fi
fi

# --- The place ------------------------------------------------------------------------------------------------

place=$target
while [ ! -e "$place" ]; do place=$(dirname "$place"); done
if [ -e "$target" ] && [ ! -d "$target" ]; then
    misfit "$target is no folder: choose another --prefix"
elif [ -d "$target" ] && [ ! -f "$target/$list" ] && [ -n "$(ls -A "$target")" ]; then
    misfit "$target exists and holds something else: choose a folder of its own with --prefix"
elif [ -f "$target/$list" ] && [ -n "$(strangers)" ]; then
    misfit "$target/$(strangers | head -n 1) was not installed and would be lost: move it away"
fi
[ -d "$target" ] && place=$(dirname "$target")
if [ ! -w "$place" ]; then
    misfit "$place cannot be written: run with sudo, or choose another --prefix"
fi
needed=$(($(du -sk "$source" | cut -f 1) + 65536))  # and what compiling the plugin takes
free=$(df -Pk "$place" | awk 'NR == 2 { print $4 }')
if [ "$free" -lt "$needed" ]; then
    misfit "$place has $((free / 1024)) MiB free, $((needed / 1024)) MiB are needed: free disk space"
fi

[ $misfits -eq 0 ] || fail "nothing was installed"
if [ "$task" = check ]; then
    say "edgeprune $version fits; nothing was changed"
    exit 0
fi

# --- Installing -----------------------------------------------------------------------------------------------

parent=$(dirname "$target")
partial=$parent/.edgeprune.partial-$$
old=$parent/.edgeprune.old-$$
build=
clean() {
    rm -rf "$partial" ${build:+"$build"}
    # Stopped between the two renames: the earlier installation comes back.
    if [ -e "$old" ] && [ ! -e "$target" ]; then mv "$old" "$target"; fi
    rm -rf "$old"
}
trap clean EXIT
trap 'exit 130' INT TERM HUP
mkdir -p "$parent"
mkdir "$partial"
cp -R "$source/bin" "$source/lib" "$source/include" "$source/share" "$source/README.md" "$partial/"
if [ "$how" = compiled ]; then
    cp "$source/$compiled" "$partial/lib/"
elif [ "$how" = compile ]; then
    build=$(mktemp -d)
    options=(-DEDGEPRUNE_KERNELS=ON -DEDGEPRUNE_TENSORRT=ON -DEDGEPRUNE_CUDA_ARCHITECTURES=87)
    log=${TMPDIR:-/tmp}/edgeprune-plugin.log
    reason=
    if ! { PATH=$PATH:/usr/local/cuda/bin cmake -S "$source/share/edgeprune/plugins" -B "$build" "${options[@]}" \
        && cmake --build "$build" --parallel 2; } > "$build/log" 2>&1; then
        cp "$build/log" "$log"
        reason="the plugin does not compile, see $log"
    elif [ "$(built_for "$build/libedgeprune_tensorrt.so")" != "${tensorrt%%.*}" ]; then
        reason="TensorRT's headers are not those of TensorRT $tensorrt: set TENSORRT_ROOT to its folder"
    fi
    if [ -z "$reason" ]; then
        cp "$build/libedgeprune_tensorrt.so" "$partial/lib/"
    elif [ "$plugin" = on ]; then
        fail "$reason; nothing was installed"
    else
        say "no plugin: $reason"
    fi
fi
files=$(cd "$partial" && { find . ! -type d | sed 's|^\./||'; echo "$list"; } | LC_ALL=C sort)
printf '%s\n' "$files" > "$partial/$list"
chmod -R u+rwX,go+rX,go-w "$partial"
[ ! -e "$target" ] || mv "$target" "$old"
mv "$partial" "$target"
say "edgeprune $version is in $target"
