package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// elsewhere is what options of qemu-nbd, qemu-storage-daemon, nbdkit and
// nbd-server are here, for those that a serve or daemon does not have.
var elsewhere = map[string]string{
	"aio":              "leave it out; --engine chooses what waits for the disk",
	"allocation-depth": "there is no such context; nbd-export map shows where the bytes are",
	"c":                noDevice,
	"connect":          noDevice,
	"chardev":          "--control PATH makes the QMP socket",
	"daemonize":        "it is --fork",
	"detect-zeroes":    "zeros that are written stay written; clients can send WRITE_ZEROES",
	"handshake-limit":  "a handshake may take 10 s; nbd-server-start of the control socket has handshake-max-seconds",
	"image-opts":       "give the image's path; daemon --blockdev takes such options",
	"ipaddr":           "it is --bind",
	"L":                noList,
	"list":             noList,
	"l":                "a snapshot is served with --snapshot NAME",
	"load-snapshot":    "it is --snapshot NAME",
	"monitor":          "--control PATH makes the QMP socket",
	"n":                "it is --cache none",
	"nocache":          "it is --cache none",
	"o":                noPart,
	"offset":           noPart,
	"P":                noPart,
	"partition":        noPart,
	"object":           isTLS,
	"tls":              isTLS,
	"tls-authz":        "who has a certificate of the authority in ca-cert.pem may connect",
	"tls-creds":        isTLS,
	"tls-verify-peer":  "it is --tls-clients verify, and so without it",
	"pidfile":          "it is --pid-file",
	"readonly":         "it is --read-only",
	"s":                "to keep an image as it is, serve an overlay of it (nbd-export create -b IMAGE)",
	"unix":             "it is --socket",
	"v":                "it is --log-level debug",
	"verbose":          "it is --log-level debug",
}

const (
	noDevice = "serve the image, then nbd-client -unix SOCKET /dev/nbdN -b 4096 connects a device, and nbd-client -d /dev/nbdN disconnects it"
	noList   = "nbdinfo --list URI shows the exports of a server"
	noPart   = "an image is served as a whole; nbdkit has filters for parts (offset, partition)"
	isTLS    = "it is --tls-certificates DIR of serve, or --object tls-creds-x509 of daemon"
)

// flagError adds to the error of a flag that a verb does not have what may have
// been meant.
func flagError(cmd *cobra.Command, err error) error {
	unknown, ok := errors.AsType[*pflag.NotExistError](err)
	if !ok {
		return err
	}
	name := unknown.GetSpecifiedName()
	if serves := cmd.Flags().Lookup("memory") != nil; serves {
		if hint := elsewhere[name]; hint != "" {
			return fmt.Errorf("%w: %s", err, hint)
		}
	}
	best, like := len(name)/3, "" // more edits than that make another word
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || len(name) < 3 {
			return
		}
		d := edits(strings.ToLower(name), f.Name)
		if strings.HasPrefix(f.Name, name) {
			d = 0
		}
		if d < best || d == best && like == "" {
			best, like = d, f.Name
		}
	})
	if like == "" {
		return err
	}
	return fmt.Errorf("%w; did you mean --%s?", err, like)
}

// edits is how many letters have to be put in, left out, changed, or exchanged with
// the next, to make b of a.
func edits(a, b string) int {
	before, last, next := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		next[0] = i
		for j := 1; j <= len(b); j++ {
			change := last[j-1]
			if a[i-1] != b[j-1] {
				change++
			}
			next[j] = min(change, last[j]+1, next[j-1]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, last, next = last, next, before
	}
	return last[len(b)]
}
