package guest

import (
	"bytes"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

//go:embed init.sh
var initScript []byte

// programs are the commands of the guest beside busybox, each with the Debian
// package that holds it. They are the host's own binaries, with their libraries.
var programs = [][2]string{
	{"mke2fs", "e2fsprogs"},
	{"e2fsck", "e2fsprogs"},
	{"nbd-client", "nbd-client"},
	{"qemu-nbd", "qemu-utils"},
}

// modules are the drivers that Debian's kernel has as modules and the guest
// needs; what they depend on is found by the kernel's own lists.
var modules = []string{"virtio_pci", "virtio_blk", "virtio_net", "nbd", "ext4"}

// base builds the part of the guest's file system that all guests share. It
// takes about a tenth of a second, so it is made anew by every test process
// and can never be stale.
var base = sync.OnceValues(buildBase)

// system is what every guest boots.
type system struct {
	kernel string // path of the kernel on the host, uncompressed
	initrd []byte // an archive, to which more may be appended
}

func buildBase() (*system, error) {
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	s := &system{kernel: filepath.Join(cache, "kernel/vmlinux")}
	trees, _ := filepath.Glob(filepath.Join(cache, "kernel/lib/modules/*"))
	if _, err := os.Stat(s.kernel); err != nil || len(trees) != 1 {
		return nil, fmt.Errorf("no kernel for the test guest in %s/kernel: run integration/scripts/install-peers (it unpacks Debian's linux-image)", cache)
	}
	a := newArchive()
	for _, d := range []string{"/proc", "/sys", "/dev", "/tmp", "/mnt", "/run", "/var/lock", "/etc"} {
		a.dir(d)
	}
	a.file("/init", initScript)
	if err := addBusybox(a); err != nil {
		return nil, err
	}
	if err := addPrograms(a); err != nil {
		return nil, err
	}
	if err := addModules(a, trees[0]); err != nil {
		return nil, err
	}
	s.initrd = a.finish()
	return s, nil
}

// cacheDir finds integration/.cache from wherever in the module the test runs.
func cacheDir() (string, error) {
	if dir := os.Getenv("NBD_EXPORT_TEST_CACHE"); dir != "" {
		return dir, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "scripts/install-peers")); err == nil {
			return filepath.Join(dir, ".cache"), nil
		}
	}
	return "", fmt.Errorf("the folder integration is not above the current one; set NBD_EXPORT_TEST_CACHE to its .cache")
}

// lookup finds a command, also where PATH of an ordinary user has no sbin.
func lookup(name, pkg string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not installed (Debian package %s): run integration/scripts/install-peers", name, pkg)
}

func addBusybox(a *archive) error {
	p, err := lookup("busybox", "busybox-static")
	if err != nil {
		return err
	}
	data, err := os.ReadFile(p)
	if err != nil {
		return err
	}
	applets, err := exec.Command(p, "--list").Output()
	if err != nil {
		return fmt.Errorf("busybox --list: %w", err)
	}
	a.file("/bin/busybox", data)
	for _, name := range strings.Fields(string(applets)) {
		if name != "busybox" {
			a.symlink("/bin/"+name, "busybox")
		}
	}
	return nil
}

func addPrograms(a *archive) error {
	libraries := map[string]bool{}
	for _, prog := range programs {
		p, err := lookup(prog[0], prog[1])
		if err != nil {
			return err
		}
		if err := addCopy(a, "/usr/bin/"+prog[0], p); err != nil {
			return err
		}
		out, err := exec.Command("ldd", p).CombinedOutput()
		if err != nil {
			return fmt.Errorf("ldd %s: %w: %s", p, err, out)
		}
		for line := range strings.Lines(string(out)) {
			// "name => /path (address)" or "/path (address)": the path is
			// the one at which the guest's loader finds it too.
			for _, word := range strings.Fields(line) {
				if strings.HasPrefix(word, "/") {
					libraries[word] = true
				}
			}
		}
	}
	for lib := range libraries {
		if err := addCopy(a, lib, lib); err != nil {
			return err
		}
	}
	for _, alias := range []string{"mkfs.ext4", "mkfs.ext2"} {
		a.symlink("/usr/bin/"+alias, "mke2fs")
	}
	if _, err := os.Stat("/etc/mke2fs.conf"); err == nil {
		return addCopy(a, "/etc/mke2fs.conf", "/etc/mke2fs.conf")
	}
	return nil
}

func addCopy(a *archive, name, source string) error {
	data, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	a.file(name, data)
	return nil
}

// addModules puts the modules and what they need into /modules, and the order
// in which init has to load them into /modules/order.
func addModules(a *archive, dir string) error {
	deps, paths, err := readModuleLists(dir)
	if err != nil {
		return fmt.Errorf("%w: run integration/scripts/install-peers", err)
	}
	var order []string
	var add func(rel string) error
	add = func(rel string) error {
		file := moduleName(rel) + ".ko"
		if slices.Contains(order, file) {
			return nil
		}
		for _, d := range deps[rel] {
			if err := add(d); err != nil {
				return err
			}
		}
		data, err := readModule(filepath.Join(dir, rel))
		if err != nil {
			return err
		}
		a.file("/modules/"+file, data)
		order = append(order, file)
		return nil
	}
	// ext4 asks for its checksum by name at run time, which no list shows.
	for _, name := range append([]string{"crc32c_generic"}, modules...) {
		rel, ok := paths[name]
		if !ok {
			continue // built into this kernel; if it is nowhere, the test that needs it says so
		}
		if err := add(rel); err != nil {
			return err
		}
	}
	a.file("/modules/order", []byte(strings.Join(order, "\n")+"\n"))
	return nil
}

// readModuleLists reads modules.dep: "path: path path ...", the module named
// last being needed first; a module's own line names all it needs.
func readModuleLists(dir string) (deps map[string][]string, paths map[string]string, err error) {
	list, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, nil, err
	}
	deps, paths = map[string][]string{}, map[string]string{}
	for line := range strings.Lines(string(list)) {
		rel, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		deps[rel] = strings.Fields(rest)
		paths[moduleName(rel)] = rel
	}
	return deps, paths, nil
}

func moduleName(rel string) string {
	name, _, _ := strings.Cut(filepath.Base(rel), ".")
	return strings.ReplaceAll(name, "-", "_")
}

// readModule reads a module, unpacked where a newer Debian compresses it.
func readModule(p string) ([]byte, error) {
	tool := map[string]string{".xz": "xz", ".zst": "zstd", ".gz": "gzip"}[filepath.Ext(p)]
	if tool == "" {
		return os.ReadFile(p)
	}
	var stderr bytes.Buffer
	cmd := exec.Command(tool, "-dc", p)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s -dc %s: %w: %s", tool, p, err, stderr.String())
	}
	return out, nil
}
