// Command criclient makes each single CRI call through the kubelet's own client library and checks the answer.
//
//	criclient SOCKET IMAGE DIR
//
// IMAGE must be in the runtime already; DIR is a scratch directory for logs. It prints one line a call and ends
// with status 1 at the first answer that a kubelet would not take.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	remote "k8s.io/cri-client/pkg"
)

type suite struct {
	ctx     context.Context
	runtime internalapi.RuntimeService
	images  internalapi.ImageManagerService
	image   string
	dir     string
	sandbox string
	config  *runtimeapi.PodSandboxConfig
}

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: criclient SOCKET IMAGE DIR")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "criclient:", err)
		os.Exit(1)
	}
}

func run(socket, image, dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	endpoint := "unix://" + socket
	runtime, err := remote.NewRemoteRuntimeService(ctx, endpoint, 30*time.Second, nil, false)
	if err != nil {
		return fmt.Errorf("connect to the runtime service: %w", err)
	}
	images, err := remote.NewRemoteImageService(ctx, endpoint, 30*time.Second, nil, false)
	if err != nil {
		return fmt.Errorf("connect to the image service: %w", err)
	}
	s := &suite{ctx: ctx, runtime: runtime, images: images, image: image, dir: dir}
	steps := []struct {
		name string
		call func() error
	}{
		{"Version", s.version},
		{"Status", s.status},
		{"RuntimeConfig", s.runtimeConfig},
		{"UpdateRuntimeConfig", s.updateRuntimeConfig},
		{"images", s.listImages},
		{"RunPodSandbox", s.runSandbox},
		{"sandbox status", s.sandboxStatus},
		{"container life", s.containerLife},
		{"not found", s.notFound},
		{"unimplemented", s.unimplemented},
		{"stop and remove", s.stopAndRemove},
		{"PullImage", s.pullImage},
		{"RemoveImage", s.removeImage},
	}
	for _, step := range steps {
		start := time.Now()
		if err := step.call(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		fmt.Printf("%-20s ok %6.1f ms\n", step.name, float64(time.Since(start).Microseconds())/1000)
	}
	return nil
}

func (s *suite) version() error {
	v, err := s.runtime.Version(s.ctx, "0.1.0")
	if err != nil {
		return err
	}
	if v.RuntimeName != "coracle" || v.RuntimeApiVersion != "v1" || v.Version == "" || v.RuntimeVersion == "" {
		return fmt.Errorf("odd answer: %v", v)
	}
	return nil
}

func (s *suite) status() error {
	r, err := s.runtime.Status(s.ctx, true)
	if err != nil {
		return err
	}
	for _, name := range []string{"RuntimeReady", "NetworkReady"} {
		found := false
		for _, c := range r.Status.Conditions {
			if c.Type == name {
				found = true
				if !c.Status {
					return fmt.Errorf("%s is false: %s %s", name, c.Reason, c.Message)
				}
			}
		}
		if !found {
			return fmt.Errorf("condition %s is missing", name)
		}
	}
	for _, h := range r.RuntimeHandlers {
		if h.Name == "" {
			return nil
		}
	}
	return errors.New("no default runtime handler")
}

func (s *suite) runtimeConfig() error {
	r, err := s.runtime.RuntimeConfig(s.ctx)
	if err != nil {
		return err
	}
	if r.Linux == nil || r.Linux.CgroupDriver != runtimeapi.CgroupDriver_CGROUPFS {
		return fmt.Errorf("odd cgroup driver: %v", r)
	}
	return nil
}

func (s *suite) updateRuntimeConfig() error {
	return s.runtime.UpdateRuntimeConfig(s.ctx, &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: "10.9.0.0/24"}})
}

func (s *suite) listImages() error {
	spec := &runtimeapi.ImageSpec{Image: s.image}
	st, err := s.images.ImageStatus(s.ctx, spec, false)
	if err != nil {
		return err
	}
	if st.Image == nil || st.Image.Id == "" || st.Image.Size == 0 {
		return fmt.Errorf("ImageStatus of %s: %v", s.image, st.Image)
	}
	list, err := s.images.ListImages(s.ctx, nil)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return errors.New("ListImages gives nothing")
	}
	absent, err := s.images.ImageStatus(s.ctx, &runtimeapi.ImageSpec{Image: "absent.example/x:y"}, false)
	if err != nil || absent.Image != nil {
		return fmt.Errorf("an absent image: %v, %v", absent, err)
	}
	if err := s.images.RemoveImage(s.ctx, &runtimeapi.ImageSpec{Image: "absent.example/x:y"}); err != nil {
		return fmt.Errorf("remove an absent image: %w", err)
	}
	fs, err := s.images.ImageFsInfo(s.ctx)
	if err != nil {
		return err
	}
	if len(fs.ImageFilesystems) == 0 || fs.ImageFilesystems[0].FsId.GetMountpoint() == "" {
		return fmt.Errorf("ImageFsInfo: %v", fs)
	}
	return nil
}

func (s *suite) runSandbox() error {
	s.config = &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "single", Namespace: "default", Uid: "uid-single", Attempt: 0},
		Hostname:     "single",
		LogDirectory: s.dir,
		Labels:       map[string]string{"a": "b"},
		Annotations:  map[string]string{"note": "kept as it is"},
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"192.0.2.53"}, Searches: []string{"example.test"}},
		Linux:        &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{}},
	}
	var err error
	if s.sandbox, err = s.runtime.RunPodSandbox(s.ctx, s.config, ""); err != nil {
		return err
	}
	again, err := s.runtime.RunPodSandbox(s.ctx, s.config, "")
	if err != nil || again != s.sandbox {
		return fmt.Errorf("the same request again: %s, %v instead of %s", again, err, s.sandbox)
	}
	if _, err := s.runtime.RunPodSandbox(s.ctx, &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "x", Namespace: "y", Uid: "z"}}, "no-such-handler"); err == nil {
		return errors.New("an unknown runtime handler was taken")
	}
	return nil
}

func (s *suite) sandboxStatus() error {
	r, err := s.runtime.PodSandboxStatus(s.ctx, s.sandbox, true)
	if err != nil {
		return err
	}
	st := r.Status
	if st.State != runtimeapi.PodSandboxState_SANDBOX_READY || st.Network.GetIp() == "" || st.CreatedAt == 0 {
		return fmt.Errorf("odd status: %v", st)
	}
	if st.Annotations["note"] != "kept as it is" || st.Labels["a"] != "b" {
		return fmt.Errorf("labels or annotations changed: %v", st)
	}
	list, err := s.runtime.ListPodSandbox(s.ctx, &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"a": "b"}})
	if err != nil || len(list) != 1 {
		return fmt.Errorf("ListPodSandbox by label: %v, %v", list, err)
	}
	return nil
}

func (s *suite) containerLife() error {
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "main", Attempt: 0},
		Image:    &runtimeapi.ImageSpec{Image: s.image},
		Command:  []string{"sh", "-c", "echo one; echo two >&2; trap 'exit 7' TERM; while :; do sleep 0.1; done"},
		LogPath:  "main.log",
		Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{}},
	}
	id, err := s.runtime.CreateContainer(s.ctx, s.sandbox, config, s.config)
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	if err := s.runtime.StartContainer(s.ctx, id); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	stdout, stderr, err := s.runtime.ExecSync(s.ctx, id, []string{"sh", "-c", "echo out; echo err >&2"}, 10*time.Second)
	if err != nil || string(stdout) != "out\n" || string(stderr) != "err\n" {
		return fmt.Errorf("exec: %q %q %v", stdout, stderr, err)
	}
	var exit interface{ ExitStatus() int }
	if _, _, err := s.runtime.ExecSync(s.ctx, id, []string{"sh", "-c", "exit 3"}, 10*time.Second); !errors.As(err, &exit) || exit.ExitStatus() != 3 {
		return fmt.Errorf("exec that exits 3: %v", err)
	}
	if _, _, err := s.runtime.ExecSync(s.ctx, id, []string{"sleep", "20"}, time.Second); status.Code(errors.Unwrap(err)) != codes.DeadlineExceeded && !strings.Contains(fmt.Sprint(err), "timed out") && status.Code(err) != codes.DeadlineExceeded {
		return fmt.Errorf("exec past its time-out: %v", err)
	}
	if err := s.runtime.ReopenContainerLog(s.ctx, id); err != nil {
		return fmt.Errorf("reopen the log: %w", err)
	}
	stats, err := s.runtime.ContainerStats(s.ctx, id)
	if err != nil || stats.Memory.GetWorkingSetBytes().GetValue() == 0 {
		return fmt.Errorf("stats: %v %v", stats, err)
	}
	all, err := s.runtime.ListContainerStats(s.ctx, nil)
	if err != nil || len(all) == 0 {
		return fmt.Errorf("list stats with a nil filter: %v %v", all, err)
	}
	if err := s.runtime.StopContainer(s.ctx, id, 10); err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	r, err := s.runtime.ContainerStatus(s.ctx, id, true)
	if err != nil {
		return err
	}
	st := r.Status
	if st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 7 || st.Reason != "Error" || st.FinishedAt == 0 || st.ImageRef == "" {
		return fmt.Errorf("odd status after the stop: %v", st)
	}
	log, err := os.ReadFile(filepath.Join(s.dir, "main.log"))
	if err != nil || !strings.Contains(string(log), " stdout F one\n") || !strings.Contains(string(log), " stderr F two\n") {
		return fmt.Errorf("log: %q %v", log, err)
	}
	list, err := s.runtime.ListContainers(s.ctx, &runtimeapi.ContainerFilter{PodSandboxId: s.sandbox})
	if err != nil || len(list) != 1 || list[0].Id != id {
		return fmt.Errorf("list: %v %v", list, err)
	}
	if err := s.runtime.RemoveContainer(s.ctx, id); err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	return s.runtime.RemoveContainer(s.ctx, id)
}

func (s *suite) notFound() error {
	if _, err := s.runtime.ContainerStatus(s.ctx, "0000", false); status.Code(err) != codes.NotFound {
		return fmt.Errorf("status of an absent container: %v", err)
	}
	if _, err := s.runtime.PodSandboxStatus(s.ctx, "0000", false); status.Code(err) != codes.NotFound {
		return fmt.Errorf("status of an absent sandbox: %v", err)
	}
	for _, call := range []func() error{
		func() error { return s.runtime.StopPodSandbox(s.ctx, "0000") },
		func() error { return s.runtime.RemovePodSandbox(s.ctx, "0000") },
		func() error { return s.runtime.StopContainer(s.ctx, "0000", 1) },
		func() error { return s.runtime.RemoveContainer(s.ctx, "0000") },
	} {
		if err := call(); err != nil && status.Code(err) != codes.NotFound {
			return fmt.Errorf("an absent object: %w", err)
		}
	}
	return nil
}

func (s *suite) stopAndRemove() error {
	for range 2 {
		if err := s.runtime.StopPodSandbox(s.ctx, s.sandbox); err != nil {
			return fmt.Errorf("stop: %w", err)
		}
	}
	r, err := s.runtime.PodSandboxStatus(s.ctx, s.sandbox, false)
	if err != nil || r.Status.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		return fmt.Errorf("after the stop: %v %v", r, err)
	}
	for range 2 {
		if err := s.runtime.RemovePodSandbox(s.ctx, s.sandbox); err != nil {
			return fmt.Errorf("remove: %w", err)
		}
	}
	return nil
}

// What this release lacks is refused by code and with a text, and not left unanswered.
func (s *suite) unimplemented() error {
	for name, call := range map[string]func() error{
		"CheckpointContainer": func() error {
			return s.runtime.CheckpointContainer(s.ctx, &runtimeapi.CheckpointContainerRequest{ContainerId: "0000", Location: filepath.Join(s.dir, "checkpoint")})
		},
		"PodSandboxStats": func() error {
			_, err := s.runtime.PodSandboxStats(s.ctx, s.sandbox)
			return err
		},
		"ListMetricDescriptors": func() error {
			_, err := s.runtime.ListMetricDescriptors(s.ctx)
			return err
		},
	} {
		err := call()
		if status.Code(err) != codes.Unimplemented || !strings.Contains(status.Convert(err).Message(), name) {
			return fmt.Errorf("%s: %v", name, err)
		}
	}
	return nil
}

// A registry that nobody serves: the error comes soon and names it.
func (s *suite) pullImage() error {
	start := time.Now()
	_, err := s.images.PullImage(s.ctx, &runtimeapi.ImageSpec{Image: "127.0.0.1:1/nothing:latest"}, nil, s.config)
	if err == nil || status.Code(err) == codes.Unimplemented || !strings.Contains(err.Error(), "127.0.0.1:1") {
		return fmt.Errorf("from a registry that is not there: %v", err)
	}
	if took := time.Since(start); took > time.Minute {
		return fmt.Errorf("a refused connection took %v", took)
	}
	return nil
}

func (s *suite) removeImage() error {
	spec := &runtimeapi.ImageSpec{Image: s.image}
	for range 2 {
		if err := s.images.RemoveImage(s.ctx, spec); err != nil {
			return err
		}
	}
	st, err := s.images.ImageStatus(s.ctx, spec, false)
	if err != nil || st.Image != nil {
		return fmt.Errorf("it is there still: %v, %v", st, err)
	}
	return nil
}
