package integration

import (
	"encoding/json"
	"path/filepath"
	"testing"
)

func TestQemuImgConvertFromExport(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	everyServer(t, func(t *testing.T, kind string) {
		for _, format := range []string{"raw", "qcow2"} {
			t.Run(format, func(t *testing.T) {
				image := patchyImage(t, tmpfsDir(t), 24*mib)
				s := startTarget(t, kind, image, targetOptions{readOnly: true})
				copied := filepath.Join(t.TempDir(), "copy")
				run(t, "qemu-img", "convert", "-f", "raw", "-O", format, s.uri, copied)
				run(t, "qemu-img", "compare", "-U", "-f", "raw", "-F", format, image, copied)
				if format == "raw" {
					sameBytes(t, "the copy", readFile(t, copied), readFile(t, image))
				}
			})
		}
	})
}

func TestQemuImgConvertToExport(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	everyServer(t, func(t *testing.T, kind string) {
		everyPlace(t, func(t *testing.T, dir string) {
			source := patchyImage(t, t.TempDir(), 24*mib)
			image := randomImage(t, dir, 3, 24*mib) // every old byte must go
			s := startTarget(t, kind, image, targetOptions{})
			run(t, "qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", source, s.uri)
			sameBytes(t, "the image", readFile(t, image), readFile(t, source))
		})
	})
}

func TestQemuImgInfo(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	everyServer(t, func(t *testing.T, kind string) {
		s := startTarget(t, kind, sparseImage(t, tmpfsDir(t), 24*mib), targetOptions{name: "disk"})
		var info struct {
			VirtualSize int64  `json:"virtual-size"`
			Format      string `json:"format"`
		}
		if err := json.Unmarshal([]byte(run(t, "qemu-img", "info", "--output=json", s.uri)), &info); err != nil {
			t.Fatal(err)
		}
		if info.VirtualSize != 24*mib || info.Format != "raw" {
			t.Errorf("qemu-img info: %+v", info)
		}
	})
}
